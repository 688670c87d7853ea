"""A front end in a process of its own: front_end_script.py ROOT DOOR prints the tokens of one request as JSON."""

import asyncio
import json
import sys

sys.path.insert(0, sys.argv[1])

import msgspec

from shoal.launcher.attached import AttachedReplica, Door, new_front_end
from shoal.launcher.controller import Controller, ControllerOptions
from tests.launcher.harness import collect, request


async def main() -> None:
    door = msgspec.json.decode(sys.argv[2], type=Door)
    front_end = new_front_end()

    async def ask() -> Door:
        return door

    async def factory(number: int) -> AttachedReplica:
        return AttachedReplica(ask, 10.0, "prod", front_end)

    controller = Controller(factory, 1, ControllerOptions(start_timeout_s=20.0))
    await controller.start()
    tokens, _ = await collect(controller.submit(request([5, 6], 250)))
    print(json.dumps(tokens))
    await controller.close()


asyncio.run(main())
