// Command program saves a few bytes with an installed kvferry.
package main

import (
	"context"
	"fmt"
	"log"
	"unsafe"

	"example.org/kvferry"
)

func main() {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	from, to := []byte("moved"), make([]byte, 5)
	regions := []kvferry.Region{{Address: unsafe.Pointer(&from[0]), Width: 5, Rows: 1}}
	if _, err := engine.SaveRegions(context.Background(), regions, kvferry.Bytes(to)); err != nil {
		log.Fatal(err)
	}
	if string(to) != "moved" {
		log.Fatalf("%q", to)
	}
	fmt.Println("kvferry in Go:", string(to))
}
