"""``python -m noisyclean``."""

from noisyclean.cli import main

if __name__ == "__main__":
    main()
