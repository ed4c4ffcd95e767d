def summarise(x):
  return x


def write(a, b):
  pass
