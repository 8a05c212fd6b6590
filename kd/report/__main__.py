"""Run the command line of `kd.report`."""

from kd.report.command_line import main

if __name__ == "__main__":
    main()
