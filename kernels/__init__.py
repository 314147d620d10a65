"""The Triton kernels, one a file, each with its formula, its launcher, its operator and the ATen reference.

    smooth            round to nearest, random rounding, variance, the term's gradient of one weight, in one pass
    adamw_smooth      AdamW and the term, many weights in one launch
    curvature         a linear layer's weight gradient and its full curvature
    variance_linear   mean and variance of a linear layer whose weight is random
    pack              a weight to the codes and scales that are deployed
    packed_linear     a linear layer on a packed weight
    scaled_linear     the same with activations of 4 bits
    cpu_linear        a linear layer on a packed weight on a CPU: no Triton but C++, compiled by `cpu_build`

What they are made of, and none of it a kernel:

    device_code       a format's and a noise law's formulas as device functions; templates
    blocks            a block's scale at work: weights in grid units, slopes by the scale
    division, e2m1, operands, philox, tiles
                      the quotient, the conversion to E2M1, squares as operands, random numbers, tiles of a matrix
    view, places      a weight in pieces and tiles: on the host, and on the device
    packed            a packed weight: its layout, what it unpacks to, and what is wrong with one

And how one is launched:

    device            on which device, for which architecture; needs no Triton, nor do `config` and `targets`
    config, tuning    one way to launch a kernel; which of its candidates is chosen, by ``tuning.json``
    targets           the architectures: limits, rates, instructions

`audit` compiles the kernels without a GPU and predicts their time, `emit` does so with what Inductor emits. Both stand
above this folder, whose files import `lotion_fx.numerics` and each other, and no kernel imports another one's helpers.
"""
