"""The local SSD: RocksDB, in a process of its own that serves all engines which name its directory.

tier.py      what an engine has: `RocksTier`
staging.py   shared memory between an engine and the owner: keys and chunks go through it
messages.py  what they say to each other
spawn.py     starting the owner, one for a directory
owner.py     the owner's loop
database.py  the database: index, room, expiry
"""
