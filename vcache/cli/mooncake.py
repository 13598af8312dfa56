"""A Mooncake Store on this machine, for development: a master, and a holder that lends memory.

`vcache mooncake up` runs until it is ended, and says how to point engines there. It is not for production:
Mooncake has no authentication. The master answers on the loopback address only; the holder, as every client
of Mooncake, listens on ports of its own choice on all addresses: use it where nobody else reaches them.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import NoReturn

import msgspec

from vcache.cli import present
from vcache.cli.invocation import Invocation
from vcache.config import parse_size
from vcache.errors import Unavailable

_READY_S = 30.0
_LOOK_S = 0.5
"""How often it is looked whether the master still runs."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vcache mooncake`."""
    parser.add_argument("action", choices=("up",))
    parser.add_argument(
        "--port", type=int, default=50051, help="of the master (default 50051; 0: a free one)"
    )
    parser.add_argument("--size", default="1GiB", help="memory to lend (default 1GiB; 0: none)")
    parser.add_argument("--offload", type=Path, metavar="DIR", help="offload what is lent to this directory")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the master's log")


def run(invocation: Invocation) -> NoReturn:
    """Start both, say so, and wait to be ended."""
    from vcache.tiers.configured import mooncake_tier
    from vcache.tiers.mooncake.master import Master

    options, config = invocation.options, invocation.config
    with Master(port=options.port, offload=options.offload is not None, log=options.log) as master:
        mooncake = msgspec.structs.replace(
            config.tiers.mooncake,
            master=master.address,
            metadata=master.metadata,
            host=master.host,
            lend=parse_size(options.size),
            offload_directory=None if options.offload is None else str(options.offload),
        )
        tiers = msgspec.structs.replace(config.tiers, mooncake=mooncake)
        tier = mooncake_tier(msgspec.structs.replace(config, tiers=tiers))
        try:
            if not tier.wait_ready(_READY_S):
                raise Unavailable(f"the master at {master.address} does not take this client")
            if invocation.as_json:
                present.write_json({"master": master.address, "lends": mooncake.lend})
            else:
                lent = present.size(mooncake.lend) if mooncake.lend else "nothing"
                said = [
                    f"Mooncake's master answers at {master.address}; this process lends {lent}.",
                    f"Engines: VCACHE_TIERS_ORDER=mooncake VCACHE_TIERS_MOONCAKE_MASTER={master.address}",
                ]
                present.console().print(present.lines(*said))
            end = threading.Event()
            while (code := master.exit_code) is None:
                end.wait(_LOOK_S)
            raise Unavailable(f"mooncake_master ended with {code}; what was lent is of no use any more")
        finally:
            tier.close()
