"""Score maps: the prediction of a vision network for one image, as an exact sum.

For one image a network is affine from every layer on, once everything nonlinear in it (ReLU masks, pooling switches,
gates, norms, attention weights) is frozen at that image (Yu et al. 2015, *The linear representation of CNN for single
image*, Eq. (2)-(4))::

    S_c = A_{c,l} · Y_l + B_{c,l}                  for every layer l
    M_{c,l}(x, y) = sum_h A_{c,l}(x, y, h) Y_l(x, y, h)

======= ==============================================================================================
symbol  meaning
======= ==============================================================================================
S       score of a label: the logit, before softmax
Y       output of a layer (the *activations*); Y_0 is the image
A       *coefficients* of the score in Y; for piecewise-linear networks the gradient
B       *bias*: what the layers above add whatever Y is
M       *score map*: the *sub-scores* A·Y, summed over channels
N       images of a batch
V       views of an image
C       channels
H, W    rows and columns
K       labels
mask    which ReLUs are open at the image
switch  which position a pooling window took at the image
======= ==============================================================================================
"""

__version__ = "0.1.0"
