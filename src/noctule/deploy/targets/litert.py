TARGET=type("T",(),{"name":"litert"})
