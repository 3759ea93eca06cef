from experiments import cli, report

cli.run(report.main)
