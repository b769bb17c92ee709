//! What the ports share: [`listener`] serves connections within limits, [`tls`] authenticates them, and
//! `guard` refuses requests of foreign web pages. [`application`] is the port for
//! programs, [`admin`] that for operators.

pub mod admin;
pub mod application;
pub(crate) mod guard;
pub mod listener;
pub mod tls;
