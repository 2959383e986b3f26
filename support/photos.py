"""Files of phones and cameras: those that cannot be read here are counted and left out."""

from PIL import features

from data import RAW, can_read_heif, warn

# {kind: (extensions, function: True if they can be read, what to do if not)}
KINDS = {
    "HEIC pictures": ((".heic", ".heif"), can_read_heif, "pip install pillow-heif"),
    "AVIF pictures": ((".avif",), lambda: features.check("avif"), "pip install 'pillow>=11.3'"),
    "raw files of cameras": (RAW, lambda: False, "convert them to JPEG"),
}


def readable(where, paths):
    """The list of those of some paths that can be read here.

    Prints a line for each kind of the others. where: a folder or a list that has them, for the
    lines. Raises ValueError if none of the paths can be read.
    """
    lines, kept = [], list(paths)
    for kind, (extensions, can_read, remedy) in KINDS.items():
        found = [path for path in kept if path.lower().endswith(extensions)]
        if found and not can_read():
            lines.append(f"{len(found)} {kind} cannot be read ({min(found)}): {remedy}")
            kept = [path for path in kept if not path.lower().endswith(extensions)]
    if not kept:
        raise ValueError(f"no pictures in {where} that can be read: {'; '.join(lines)}")
    for line in lines:
        warn(f"{where}: {line}")
    return kept
