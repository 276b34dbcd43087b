"""How many blocks of a kernel a multiprocessor holds at once."""

# Shared memory and threads of a multiprocessor, by architecture; registers of any.
SHARED_TOTAL = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS, RESERVED, BLOCKS = 65536, 1024, 32  # RESERVED: bytes of shared memory of each block


def blocks(arch: int, registers: int, shared: int, threads: int) -> int:
    """arch: 90; registers of a thread, bytes of shared memory and threads of a block."""
    warps = -(-threads // 32)
    allocated = -(-registers // 8) * 8 * 32 * warps
    by_shared = SHARED_TOTAL[arch] // (shared + RESERVED)
    return min(REGISTERS // allocated, by_shared, THREADS[arch] // (32 * warps), BLOCKS)
