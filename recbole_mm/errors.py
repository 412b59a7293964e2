"""The one exception for wrong input."""


class UserError(ValueError):
    """Wrong input: settings, files or arguments that the user can put right.

    The message is one paragraph: what was expected, what came, from where, what to do next. The command line prints it and exits with
    2; every other exception is a bug of ours and shows its traceback.
    """


def nearest(name: str, known, n: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` for the known names closest to `name`, or an empty string."""
    import difflib

    lower = {str(k).lower(): str(k) for k in known}
    matches = [lower[m] for m in difflib.get_close_matches(str(name).lower(), list(lower), n=n, cutoff=0.6)]
    return f" Did you mean {', '.join(matches)}?" if matches else ""
