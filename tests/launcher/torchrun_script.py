# A launch by torchrun with fake workers; run by test_torchrun.py with: SOURCE_ROOT TENSOR PIPELINE DATA HOW
import asyncio
import os
import sys

sys.path.insert(0, sys.argv[1])

from shoal.launcher import torchrun_world
from shoal.launcher.torchrun_follow import follow_model
from shoal.launcher.torchrun_start import start_torchrun
from tests.launcher.fake_worker import SPEC, WORKER, config
from tests.launcher.harness import collect, expected, request

settings = config(*(int(size) for size in sys.argv[2:5]))
how = sys.argv[5]
if how == "differs" and os.environ["RANK"] == "2":
    settings = config(*(int(size) for size in sys.argv[2:5]), step_timeout_s=21.0)
if how == "restarts" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    sys.exit(7)  # torchrun ends all and starts all again, with the same store
if how == "hosts":  # as if every two ranks had a host of their own: TCP between them, a served store, gloo
    torchrun_world.host_id = lambda: f"host {int(os.environ['RANK']) // 2}"


async def main() -> None:
    engine = await start_torchrun(settings, SPEC, None, worker=WORKER)
    try:
        prompts = [[1, 2, number] for number in range(6)]
        streams = [collect(engine.client.submit(request(p, 8, f"r{n}"))) for n, p in enumerate(prompts)]
        for prompt, (tokens, _) in zip(prompts, await asyncio.gather(*streams), strict=True):
            assert tokens == expected(prompt)
        print("serving", len(await engine.client.stats()), flush=True)
        if how == "waits":
            await asyncio.sleep(60)
    finally:
        await engine.client.close()


if os.environ["RANK"] == "0":
    asyncio.run(main())
else:
    sys.exit(follow_model(settings, SPEC, None, WORKER))
