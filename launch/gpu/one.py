"""python -m thriftlab.launch.gpu.one BODY DEVICE whole|small TEXT FOLDER: one check, which prints its findings as JSON.

Not for people: check.py starts it and reads the last line.
"""

import json
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from thriftlab.data.files import finite
from thriftlab.launch.gpu.setting import Body, Finding, NotBuilt, Setting, Skipped


def lines(body: Body, setting: Setting) -> Iterator[dict[str, Any]]:
    """What the check says on its way, and last of all how it ended."""
    found = Finding("")
    try:
        for found in body(setting):
            yield {"status": "running", **asdict(found)}
    except Skipped as reason:
        status = "not built" if isinstance(reason, NotBuilt) else "skipped"
        yield {"status": status, **asdict(found), "says": str(reason)}
    except Exception as error:
        traceback.print_exc()
        yield {"status": "failed", **asdict(found), "error": f"{type(error).__name__}: {str(error)[:1000]}"}
    else:
        yield {"status": "wrong" if found.wrong else "ok", **asdict(found)}


def main(name: str, device: str, size: str, text: str, folder: str) -> None:
    body = pkgutil.resolve_name(f"thriftlab.launch.gpu.{name}")
    setting = Setting(torch.device(device), size == "small", Path(text), Path(folder))
    if setting.device.index is not None:
        torch.cuda.set_device(setting.device)
    for line in lines(body, setting):
        print(json.dumps(finite(line)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
