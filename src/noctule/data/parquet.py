"""Reader of Parquet files by pandas with pyarrow, an optional extra."""

from pathlib import Path

from noctule.core.errors import DataError
from noctule.data.frame import Frame
from noctule.data.objects import frame_of


def read_parquet(path: Path) -> Frame:
    """The table in a Parquet file.

    Raises:
        DataError: pandas or pyarrow is missing, or the file is no Parquet file.
    """
    try:
        import pandas

        table = pandas.read_parquet(path)
    except ImportError as error:
        raise DataError(f"{path}: Parquet is read by pandas with pyarrow: pip install 'noctule[tables]'") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise DataError(f"{path} is corrupt or no Parquet file ({error}); write it again") from error
    return frame_of(table, source=str(path))
