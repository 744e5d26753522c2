"""One rank of a run of several: called with JSON arguments, prints what came of it as JSON."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import Any


def main(arguments: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.WARNING)
    if arguments.get("gloo"):
        import torch.distributed

        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{arguments['gloo']}",
            rank=arguments["rank"],
            world_size=arguments["size"],
        )
    import drift_fast

    def progress(state: object) -> None:
        what = arguments.get("at_progress")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "interrupt":
            raise KeyboardInterrupt

    keywords = {"on_progress": progress, **arguments.get("keywords", {})}
    if isinstance(keywords.get("ranks"), list):
        keywords["ranks"] = tuple(keywords["ranks"])
    try:
        if "saved" in arguments:
            delta = drift_fast.Delta.open(arguments["saved"]).save(arguments["out"], **keywords)
        else:
            delta = drift_fast.compute_delta(
                arguments["reasoning"], arguments["multimodal"], arguments["out"], **keywords
            )
            if arguments.get("again"):
                keywords["overwrite"] = True
                delta = drift_fast.compute_delta(
                    arguments["reasoning"], arguments["multimodal"], arguments["out"], **keywords
                )
        found = {"names": delta.names}
    except BaseException as error:
        found = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
