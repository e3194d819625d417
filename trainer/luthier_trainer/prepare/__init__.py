"""The phase `prepare`: resolves, downloads and checks everything before a GPU is used."""
