"""What a skipped test needs: a wheel, a Python, or a command that would run it."""

KERAS_2 = "TensorFlow 2.15, with Keras 2, which has wheels for Python 3.10 and 3.11"
TENSORFLOW = f"{KERAS_2}, or the newest: launch/test --keras3, Python 3.10 to 3.13"
HOROVOD = "Horovod: launch/build-horovod, with Python 3.10 to 3.13"
FRAMEWORKS = {"torch": "torch: pip install hvd-sparse[torch]", "tensorflow": TENSORFLOW}
