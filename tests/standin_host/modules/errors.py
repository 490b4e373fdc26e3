"""Reports go to a list, as the hosts' go to the console."""

import traceback

reports: list[str] = []


def report(message: str, *, exc_info: bool = False) -> None:
    reports.append(message + ("\n" + traceback.format_exc() if exc_info else ""))


def display(error: Exception, task: str) -> None:
    reports.append(f"{task}: {type(error).__name__}: {error}")
