// Shows the service's own document. Credentials that are typed in last until the page is left.
SwaggerUIBundle({
  url: "../openapi.json", // below the path of a gateway too
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // the document is sent nowhere
  persistAuthorization: false,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
