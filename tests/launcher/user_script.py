# What a user's script does, without a __main__ guard; run by test_owner.py with: SOURCE_ROOT HOW TENSOR DATA
import asyncio
import sys

sys.path.insert(0, sys.argv[1])

from shoal.launcher.local_start import start_local
from tests.launcher.fake_worker import SPEC, WORKER, config
from tests.launcher.harness import collect, expected, request

how, tensor, data = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


async def main() -> None:
    engine = await start_local(config(tensor, 1, data), SPEC, None, worker=WORKER)
    try:
        tokens, _ = await collect(engine.client.submit(request([1, 2, 3])))
        assert tokens == expected([1, 2, 3])
        assert "torch" not in sys.modules, "the front end of several ranks imports no torch"
        print("serving", flush=True)
        if how == "raises":
            raise RuntimeError("the user's mistake")
        if how == "exits":
            sys.exit(3)
        await asyncio.sleep(60)
    finally:
        if how != "forgets":
            await engine.client.close()


asyncio.run(main())
