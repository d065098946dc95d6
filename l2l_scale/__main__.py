"""``python -m l2l_scale`` is ``l2l-scale``."""

from l2l_scale.cli import main

if __name__ == "__main__":
    main()
