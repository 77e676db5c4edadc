"""The form of a training run: a row for each argument, what is wrong with it below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Collapsible, Input, Select, Static

from tui.text import harmless
from tui.training_form import COMMAND, Checked, Field, command_of, fields_of, sections

PATHS = frozenset(
    ("model", "dataset", "val_dataset", "batch_input", "generate", "save", "load", "config")
)


class PathSuggester(Suggester):
    """Completes the last word of a field to a file or folder that is there; → takes it."""

    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        """The whole text with its last path completed."""
        before, space, word = value.rpartition(" ")
        if not word:
            return None
        path = Path(word).expanduser()
        folder, start = (path, "") if word.endswith("/") else (path.parent, path.name)
        try:
            names = sorted(
                child.name + "/" * child.is_dir()
                for child in folder.iterdir()
                if child.name.startswith(start) and (start or not child.name.startswith("."))
            )
        except OSError:
            return None
        return f"{before}{space}{word}{names[0][len(start) :]}" if names else None


class FieldRow(Widget):
    """One argument: its name and its value, and below what is wrong or what to know."""

    DEFAULT_CSS = """
    FieldRow {
        height: auto;
        .name { width: 24; padding: 0 1 0 0; }
        .control { width: 1fr; height: auto; }
        Horizontal { height: auto; }
        Input { background: $surface; padding: 0 1; }
        SelectCurrent { background: $surface; padding: 0 1; }
        .note { height: auto; display: none; padding: 0 0 0 24; }
        &.-changed .name { color: $text-primary; text-style: bold; }
        &:focus-within .name { text-style: underline; }
        &.-noted .note { display: block; color: $text-warning; }
        &.-wrong .note { display: block; color: $text-error; }
        &.-wrong .name { color: $text-error; }
    }
    Group FieldRow {
        .name { width: 37; }
        .note { padding: 0 0 0 37; }
    }
    """

    class Edited(Message):
        """The value of a field is another one now."""

        def __init__(self, field: Field, text: str) -> None:
            self.field = field
            self.text = text
            super().__init__()

    def __init__(self, field: Field, text: str) -> None:
        super().__init__(id=f"field-{field.name}")
        self.field = field
        self._text = text

    def compose(self) -> ComposeResult:
        """Name and control on a line, the note below."""
        field, text = self.field, self._text
        with Horizontal():
            yield Static(Content(field.name), classes="name")
            with Vertical(classes="control"):
                if field.choices:
                    yield Select(
                        [(choice, choice) for choice in field.choices],
                        prompt=field.default,
                        value=text if text in field.choices else Select.NULL,
                        compact=True,
                    )
                else:
                    yield Input(
                        text,
                        placeholder=field.default,
                        suggester=PathSuggester() if field.name in PATHS else None,
                        select_on_focus=False,
                        compact=True,
                    )
        yield Static(classes="note")

    class Entered(Message):
        """The cursor is in a field now."""

        def __init__(self, field: Field) -> None:
            self.field = field
            super().__init__()

    def on_descendant_focus(self) -> None:
        """Have it explained."""
        self.post_message(self.Entered(self.field))

    def on_mount(self) -> None:
        """Show what its first text says."""
        self.set_class(bool(self._text), "-changed")
        self.tell(self.field.problem(self._text))

    @property
    def text(self) -> str:
        """What stands in the field; empty for the default."""
        return self._text

    def set_text(self, text: str) -> None:
        """Put a text into the field."""
        for box in self.query(Input):
            box.value = text
        for choice in self.query(Select):
            choice.value = text if text in self.field.choices else Select.NULL

    def tell(self, problem: str | None, note: str = "") -> None:
        """Show what is wrong, or what to know; nothing where there is neither."""
        self.set_class(problem is not None, "-wrong")
        self.set_class(bool(note), "-noted")
        self.query_one(".note", Static).update(Content(harmless(problem or note)))

    def focus_field(self) -> None:
        """Put the cursor into it."""
        self.query("Input, Select").first().focus()

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._edited(event.value)

    @on(Select.Changed)
    def _chosen(self, event: Select.Changed) -> None:
        event.stop()
        self._edited("" if event.value is Select.NULL else str(event.value))

    def _edited(self, text: str) -> None:
        if text == self._text:
            return
        self._text = text
        self.set_class(bool(text.strip()), "-changed")
        self.tell(self.field.problem(text))
        self.post_message(self.Edited(self.field, text))


class Group(Collapsible):
    """A group of arguments; its rows are made when it is opened for the first time."""

    def __init__(self, title: str, fields: list[Field]) -> None:
        self._body = Vertical()
        super().__init__(self._body, title=title)
        self.fields = fields
        self._made = False

    async def make(self, values: Mapping[str, str]) -> None:
        """Make the rows, once."""
        if not self._made:
            self._made = True
            await self._body.mount_all(
                FieldRow(field, values.get(field.name, "")) for field in self.fields
            )


class TrainingForm(VerticalScroll, can_focus=False):
    """All arguments of a run. What stands in it is in `values`, also of groups never opened."""

    DEFAULT_CSS = """
    TrainingForm {
        padding: 0 1;
        scrollbar-size-vertical: 1;
        #essential { margin: 0 0 1 0; }
        Vertical { height: auto; }
        Collapsible { background: $background; border-top: none; padding: 0; }
        Collapsible > Contents { padding: 0 0 1 2; }
        CollapsibleTitle { color: $foreground; text-style: none; padding: 0; }
    }
    """

    def __init__(self, values: Mapping[str, str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        (_, self._first), *self._groups = sections()
        self.fields = {
            field.name: field
            for fields in (self._first, *(fields for _, fields in self._groups))
            for field in fields
        }
        self.values = dict(values)

    def compose(self) -> ComposeResult:
        """What matters most, then the groups, closed."""
        with Vertical(id="essential"):
            for field in self._first:
                yield FieldRow(field, self.values.get(field.name, ""))
        for title, fields in self._groups:
            yield Group(f"{title} ({len(fields)})", fields)

    def on_mount(self) -> None:
        """Show the fields of the command."""
        self._show_command()

    def _show_command(self) -> None:
        """Only the fields that the command has."""
        known = fields_of(command_of(self.values))
        for group in self.query(Group).results(Group):
            group.display = any(field.name in known for field in group.fields)
        for row in self._rows:
            row.display = row.field.name in known

    @property
    def _rows(self) -> Iterator[FieldRow]:
        yield from self.query(FieldRow).results(FieldRow)

    @on(Collapsible.Expanded)
    async def _opened(self, event: Collapsible.Expanded) -> None:
        if isinstance(event.collapsible, Group):
            await event.collapsible.make(self.values)

    @on(FieldRow.Edited)
    def _edited(self, event: FieldRow.Edited) -> None:
        self.values[event.field.name] = event.text
        if event.field.name == COMMAND:
            self._show_command()

    def load(self, values: Mapping[str, str]) -> None:
        """Fill the form with other values; what is not among them gets its default."""
        self.values = dict(values)
        for row in self._rows:
            row.set_text(values.get(row.field.name, ""))
        self._show_command()

    def tell(self, name: str, problem: str) -> None:
        """Show what the run itself found wrong with a field."""
        for row in self._rows:
            if row.field.name == name:
                row.tell(problem)
                row.focus_field()

    async def show(self, checked: Checked) -> None:
        """Show what a check of the whole found, and go to the first field that is wrong."""
        for group in self.query(Group).results(Group):
            if any(field.name in checked.errors for field in group.fields):
                await group.make(self.values)
                group.collapsed = False
        wrong = None
        for row in self._rows:
            problem = checked.errors.get(row.field.name)
            row.tell(problem, checked.notes.get(row.field.name, ""))
            if problem is not None and wrong is None:
                wrong = row
        if wrong is not None:
            wrong.focus_field()
            wrong.scroll_visible(animate=False)
