"""discard() in a branch of a tf.function, which starts when it has what it uses."""

import numpy as np
import tensorflow as tf

BRANCHES = ["discard alone", "weights in the other"]


def assert_its_own_step_is_thrown_away(make_tape, discarding, rank, branch):
    """Though the gradient, and so the exchange, comes late.

    Args:
        make_tape: returns a distributed tape, in the function.
        discarding: has discard() and state_dict().
        rank: of this process.
        branch: one of BRANCHES.
    """
    variable, slow = tf.Variable(tf.zeros(64)), tf.random.uniform((600, 600))
    slopes = tf.range(1.0, 65.0) * (1 + rank)

    @tf.function
    def step(bad, scale, slow):
        for _ in range(4):  # unrolled
            slow = tf.linalg.matmul(slow, slow) / 300
        late = tf.clip_by_value(tf.reduce_sum(slow), 0.0, 0.0)
        with make_tape() as tape:
            loss = tf.reduce_sum(variable * (slopes + late)) * scale
        [gradient] = tape.gradient(loss, [variable])
        if bad:
            discarding.discard()
            gradient = tf.zeros(64)
        elif branch == "weights in the other":
            variable.assign_sub(gradient)
        if branch == "discard alone":
            variable.assign_sub(gradient)

    step(tf.constant(False), tf.constant(1.0), slow)
    [before] = discarding.state_dict()["tensors"].values()
    weights = variable.numpy()
    for count in range(2, 12):  # another gradient each time, or it would not show
        step(tf.constant(True), tf.constant(float(count)), slow)
        [after] = discarding.state_dict()["tensors"].values()
        assert after["step"] == before["step"]
        np.testing.assert_array_equal(after["residual"], before["residual"])
    np.testing.assert_array_equal(variable.numpy(), weights)
