module example.org/kvferry

go 1.22
