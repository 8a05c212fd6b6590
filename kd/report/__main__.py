"""Run the command line of `kd.report`."""

from kd.report.build import main

if __name__ == "__main__":
    main()
