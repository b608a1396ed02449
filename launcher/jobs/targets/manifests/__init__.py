"""Models of the Kubernetes objects that are rendered: exactly the fields we write, named as Kubernetes names them."""
