TARGET=type("T",(),{"name":"executorch"})
