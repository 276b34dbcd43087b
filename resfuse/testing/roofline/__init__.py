"""Bytes and operations of a training step, and the least time that a device takes for them; needs no device.

    eager, ours = (record(build, size, torch.bfloat16, fused=fused) for fused in (False, True))
    total(works(ours), SHEETS["h200"], "bfloat16").floor_ms
    total(pointwise_fused(eager.ops), SHEETS["h200"], "bfloat16").floor_ms

`recording.py` sees what runs, `work.py` adds it up, `fusion.py` says what a pointwise compiler would make of eager's
operators, `ceilings.py` what devices reach, `operations.py` the operations of a primitive.
"""
