"""What a person's labels say: a folder of classes, a table, or images with masks -> the list of labelled files.

Everything that is wrong with the labels is found here, before anything long starts, and is one line that names the file
and what to do.
"""

from uscl_hub.files import existing
from uscl_hub.labels.checks import checked
from uscl_hub.labels.folder import from_folder
from uscl_hub.labels.groups import cluster
from uscl_hub.labels.items import TASKS, Item, LabelError, Labels
from uscl_hub.labels.table import from_table

__all__ = ["TASKS", "Item", "LabelError", "Labels", "cluster", "read_labels"]


def read_labels(folder_or_table, task: str | None = None, *, columns: tuple[str, ...] = (), frames="images") -> Labels:
    """The labelled files, without decoding any.

    Args:
        folder_or_table: a folder `images/CLASS/file` or `CLASS/file`; a folder of images with masks (`x_mask.png`,
            `x_mask_1.png` beside `x.png`, or the same name in `masks/` beside `images/`); or a .csv, .tsv or
            .parquet with the column `path` (relative to the table) and `label`, or several columns of labels; and,
            if wanted, `group` (patient), `split` and `mask` (several files joined by ';'). A folder that holds
            labels.csv or labels.parquet means that table.
        task: one of TASKS; None: text means classes, numbers regression, several columns of 0 and 1 multilabel, masks
            without classes segmentation.
        columns: the table's columns of labels; (): `label`, else all that are not named above.
        frames: numbered images of one folder are 'images' of their own, or each such series is one 'clip'.

    Raises:
        LabelError (a UserError): in one line, for missing files or columns, one class only, values that are not
        finite, masks of another size, a group in two splits, the same file in two splits.
    """
    source = existing(folder_or_table)
    if task is not None and task not in TASKS:
        raise LabelError(f"task {task!r} is not known; choose from {', '.join(TASKS)}")
    if source is None:
        raise LabelError(f"{folder_or_table}: no such file or folder")
    tables = [path for path in (source / "labels.csv", source / "labels.parquet") if path.is_file()]
    if source.is_dir() and not tables:
        if columns:
            raise LabelError(f"{source}: has no labels.csv, so there are no columns {', '.join(columns)}")
        found = from_folder(source, task, frames)
    else:
        found = from_table(tables[0] if source.is_dir() else source, task, columns)
    return checked(found)
