"""From generated images to a verdict: nearest neighbours, ratio, EMM, figures."""
