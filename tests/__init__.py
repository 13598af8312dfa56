"""The tests of VCache."""
