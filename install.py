"""Run by the WebUI at each start: installs what training needs and the WebUI lacks, and moves nothing else.

What is needed at which version is in spo/webui/packages.py. Without a network, or when pip fails for another
reason, one sentence says so and the WebUI starts all the same.
"""

from __future__ import annotations

import sys

from spo.webui.packages import PIP_FLAGS, Missing, missing, missing_text


def main() -> None:
    """Install, look again, and say what is still missing."""
    lacking = missing()
    reason = install([item for item in lacking if item.may_install])
    still = missing() if lacking else []
    if still:
        print(missing_text(still, reason=reason))


def install(wanted: list[Missing]) -> str:
    """Install the packages one by one until one fails; why it failed, or "" when none did."""
    if not wanted:
        return ""
    import launch

    for item in wanted:
        flags = f"{PIP_FLAGS} --disable-pip-version-check --retries 1"  # few retries: this is tried at each start
        try:
            launch.run_pip(f'install {flags} "{item.requirement}"', f"{item.requirement} for SPO")
        except RuntimeError as error:
            return pip_reason(str(error))
    return ""


def pip_reason(text: str) -> str:
    """The last of pip's own error lines, or its first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition("ERROR: ")[2] for line in lines if "ERROR: " in line]
    return (errors or lines or ["pip failed"])[-1 if errors else 0]


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        print(f"install.py is run by the WebUI when it starts ({error}).", file=sys.stderr)
        sys.exit(1)
