"""fastrnn against torch.nn and other runtimes: `python -m benchmarks.run --help`."""
