"""The one exception for wrong input."""


class UserError(ValueError):
    """Wrong input: settings, files or arguments that the user can put right.

    The message is one paragraph: what was expected, what came, from where, what to do next. The command line prints it and exits with
    2; every other exception is a bug of ours and shows its traceback.
    """


def out_of_memory(error: BaseException) -> str | None:
    """What to say when `error` means that a processor's or a GPU's memory is full; None for any other error."""
    first = (str(error).splitlines() or [""])[0]
    gpu = type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in first
    if not (gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error)):
        return None
    return (
        f"The memory of the {'GPU' if gpu else 'machine'} is full{f' ({first[:200]})' if first else ''}. Smaller values of train_batch_size (with gradient_accumulation "
        "for the same step), eval_memory_mb or eval_batch_size, embedding_size, and, where an encoder runs, encoder_micro_batch or encoder_batch_size "
        "take less; so does amp: bf16 on a GPU, and fewer --jobs in a search or benchmark. What was saved stays: --resume=<run directory> goes on from there."
    )


def nearest(name: str, known, n: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` for the known names closest to `name`, or an empty string."""
    import difflib

    lower = {str(k).lower(): str(k) for k in known}
    matches = [lower[m] for m in difflib.get_close_matches(str(name).lower(), list(lower), n=n, cutoff=0.6)]
    return f" Did you mean {', '.join(matches)}?" if matches else ""
