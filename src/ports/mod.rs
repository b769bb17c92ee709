//! What the ports share: [`listener`] serves connections within limits, [`tls`] authenticates them, and
//! `guard` refuses requests of foreign web pages. [`admin`] is the port for operators.

pub mod admin;
pub(crate) mod guard;
pub mod listener;
pub mod tls;
