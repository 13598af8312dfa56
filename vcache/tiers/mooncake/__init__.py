"""Mooncake Store: chunks in the memory (and on the SSDs) of other machines.

codes.py   what its return codes mean for us
native.py  its client, guarded: never called before setup, after close or in a forked child
tier.py    what an engine has: `MooncakeTier`
master.py  a local master, for development and for tests
"""
