"""The API as others' tools read it: OpenAPI for the calls, AsyncAPI for the streams, from the types in use."""
