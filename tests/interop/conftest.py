"""The list of families at the end of a run: what was compared, and the largest error of each."""

KINDS = ('logits', 'gradients', 'losses')


def pytest_terminal_summary(terminalreporter):
  """One line per model: the largest absolute differences from the reference, each held to 1e-4."""
  found: dict[str, dict] = {}
  for report in terminalreporter.getreports('passed'):
    told = dict(report.user_properties)
    if 'family' in told:
      found.setdefault(told['family'], {}).update(told)
  if not found:
    return
  types = {told['model_type'] for told in found.values()}
  terminalreporter.section(f'{len(found)} models of {len(types)} families beside the reference')
  line = '{:22}{:22}{:>12}{:>12}{:>12}'
  terminalreporter.write_line(line.format('model', 'family', *KINDS))
  for name, told in sorted(found.items()):
    errors = [f'{told[kind]:.1e}' if kind in told else '-' for kind in KINDS]
    terminalreporter.write_line(line.format(name, told['model_type'], *errors))
