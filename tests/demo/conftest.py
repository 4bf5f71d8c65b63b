from tests.evaluate.conftest import filler, text_file

__all__ = ["filler", "text_file"]
