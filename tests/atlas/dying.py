"""What the crash tests put into their scripts: a function that kills its own process."""

DYING = """owner, name = where.split(":")
module, _, inner = owner.partition(".")
target = globals()[module]
target = getattr(target, inner) if inner else target
real, left = getattr(target, name), int(n)

def dying(*args, **kwargs):
    global left
    left -= 1
    if not left and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
"""
"""Kills its process at the n-th call of a function, before or after it. It wants ``where``
(module.class:name), ``when`` ("before" or "after") and ``n``; the function is to be replaced by
``setattr(target, name, dying)``."""
