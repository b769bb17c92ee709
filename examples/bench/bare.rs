//! A handler that does nothing: the upper bound for any axum server on this machine.

use std::net::SocketAddr;

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;
use http_body_util::BodyExt;

/// Serves until the process is killed.
pub fn serve(address: SocketAddr, value_bytes: usize) -> anyhow::Result<()> {
    let value = Bytes::from(vec![b'x'; value_bytes]);
    let router = Router::new().fallback(async move |request: Request| {
        let (head, body) = request.into_parts();
        if head.method == Method::GET {
            return Body::from(value.clone()).into_response();
        }
        match body.collect().await {
            Ok(_) => StatusCode::NO_CONTENT.into_response(),
            Err(_) => StatusCode::BAD_REQUEST.into_response(),
        }
    });
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}"))?;
        println!("a bare handler serves on {}", listener.local_addr()?);
        Ok(axum::serve(listener, router).await?)
    })
}
