"""What a run leaves behind: its folder, its page and the table that compares it with others."""

from noctule.report.compare import compare_table
from noctule.report.folder import RunFolder
from noctule.report.html import write_report
from noctule.report.journal import Journal

__all__ = ["Journal", "RunFolder", "compare_table", "write_report"]
