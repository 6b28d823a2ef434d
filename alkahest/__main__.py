from alkahest.cli import main

main()
