"""`python -m hvd_sparse` is `python -m hvd_sparse.doctor`."""

from hvd_sparse.doctor.__main__ import main

if __name__ == "__main__":
    main()
