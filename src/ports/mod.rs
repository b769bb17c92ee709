//! What the ports share: [`listener`] accepts connections within bounds, [`tls`] authenticates them,
//! and [`admin`] is the port for operators.

pub mod admin;
pub(crate) mod guard;
pub mod listener;
pub mod tls;
