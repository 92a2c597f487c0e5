// Go's net: a goroutine for each connection; its output goes when no input is left in the buffer.
//
//	echo <port>
package main

import (
	"bufio"
	"net"
	"os"
)

const maxLine = 1 << 20

func serve(c net.Conn) {
	defer c.Close()
	r, w := bufio.NewReaderSize(c, 4096), bufio.NewWriterSize(c, 4096)
	size := 0
	for {
		part, err := r.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			w.Flush()
			return
		}
		size += len(part)
		if _, failed := w.Write(part); failed != nil || size > maxLine {
			return
		}
		if err == nil {
			size = 0
		}
		if r.Buffered() == 0 && w.Flush() != nil {
			return
		}
	}
}

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		if c, err := l.Accept(); err == nil {
			go serve(c)
		}
	}
}
