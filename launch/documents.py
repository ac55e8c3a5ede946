"""thriftlab data show | export: what became of the documents of a prepared folder; those that stayed, in a file."""

from pydantic import Field

from thriftlab.data.errors import ConfigError
from thriftlab.data.paths import typed_path
from thriftlab.data.prepare.report.export import export
from thriftlab.data.prepare.report.show import show
from thriftlab.train.config.choice import Plugin, Section
from thriftlab.train.config.parse import read, validate

USES = "thriftlab data show FOLDER, or thriftlab data export FOLDER FILE"
KEYS = {"show": {"plugins", "document", "text"}, "export": {"force"}}


class DataOptions(Section):
    """What is shown, and how a file is written."""

    plugins: tuple[Plugin, ...] = Field((), description="show: Python files with rules of your own")
    document: str | None = Field(
        None, description="show: one document, by its number, its id as FILE:LINE, or the end of an id"
    )
    text: str | None = Field(None, description="show: the document that has these words")
    force: bool = Field(False, description="export: replace the file if it is there")


def show_or_export(argv: list[str]) -> None:
    settings = read(argv)
    what, *paths = settings.words or [""]
    if what not in KEYS or len(paths) != 1 + (what == "export"):
        raise ConfigError(f"thriftlab data takes a folder and what to do with it: {USES}")
    if other := (DataOptions.model_fields.keys() - KEYS[what]) & settings.tree.keys():
        raise ConfigError(f"thriftlab data {what} takes no {min(other)}; leave it out")
    options = validate(DataOptions, settings.pick(settings.tree.keys()))
    if options.document is not None and options.text is not None:
        raise ConfigError("thriftlab data show takes document or text, not both")
    folder, *out = map(typed_path, paths)
    if what == "show":
        print(show(folder, options.document, options.text))
    else:
        print(f"{out[0]}: {export(folder, out[0], options.force):,} documents")
