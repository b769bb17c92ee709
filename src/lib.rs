//! tour to be written
#![allow(missing_docs)]
pub mod channels;
pub mod codec;
pub mod error;
pub mod kvstore;
pub mod storage;
