//! Stub.
use std::fmt::Debug;
use std::hash::Hash;
#[derive(Clone, Debug)]
pub struct Operation<V> { pub client: u64, pub action: Action<V>, pub invoked: u64, pub completed: Option<u64> }
#[derive(Clone, Debug)]
pub enum Action<V> { Write(V), Read(Option<V>) }
pub fn check<V: Clone + Eq + Hash + Ord + Debug>(_history: &[Operation<V>]) -> Result<(), String> { Ok(()) }
