"""Kernel sets behind one interface: `interface` has the contract, `dispatch` the choice."""
